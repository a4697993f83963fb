"""What a user can get wrong, and what each costs: a message, and an exit code."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs import ingest, sample, score, train
from jobs.presets import DIGITS
from pipelines import checkpoints, run_folder
from pipelines.images import encode
from pipelines.manifest import Manifest, Shard
from pipelines.plain import to_dict
from pipelines.storage import Folder
from pipelines.training import claim, find_data
from pipelines.world import World
from tests.pipelines.states import ABOUT, FIT, tiny_state

Job = Callable[[list[str]], int]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, dict[str, object]]]:
    """Run a job; return its exit code, what it said on stderr and the one line that it left on stdout."""

    def go(job: Job, *argv: str) -> tuple[int, str, dict[str, object]]:
        capfd.readouterr()
        code = job(list(argv))
        out, err = capfd.readouterr()
        (line,) = out.splitlines()
        said = json.loads(line)
        assert said["exit_code"] == code
        return code, plain(err), said

    return go


def plain(text: str) -> str:
    """Text as one line, without colours and frames."""
    return re.sub(r"[\s│]+", " ", re.sub(r"\x1b\[[0-9;]*m", "", text))


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "root")


def test_no_images_at_the_url(run: Callable, root: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for job, argv in (
        (train.main, ["digits", "--root", root, "--data.builtin", "none", "--data.url", str(tmp_path / "empty")]),
        (ingest.main, ["--source", str(tmp_path / "empty"), "--out", root]),
    ):
        code, err, said = run(job, *argv)
        assert code == 3
        assert "holds no images" in err and "holds no images" in said["error"]


def test_storage_that_does_not_answer(run: Callable, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ENDPOINT_URL": "http://127.0.0.1:1", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("BRICKYARD_RETRY_S", "0.1")
    code, err, _ = run(ingest.main, "--source", "s3://bucket/images", "--out", root)
    assert code == 75
    assert "http://127.0.0.1:1/bucket does not answer as it should (ClientConnectorError)" in err
    assert "check the address, or run the same command later" in err


def test_credentials_that_cannot_be_renewed(
    run: Callable, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a program that is to fetch them says when it has to be logged in to again."""
    (tmp_path / "aws").write_text("[default]\nregion = us-east-1\ncredential_process = false\n")
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "PROFILE"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    for name, value in {"CONFIG_FILE": str(tmp_path / "aws"), "SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
                        "ENDPOINT_URL": "http://127.0.0.1:2"}.items():  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    code, err, _ = run(ingest.main, "--source", "s3://bucket/images", "--out", root)
    assert code == 75
    assert "s3://bucket/images: the credentials have expired (CredentialRetrievalError): renew them" in err


def test_a_scheme_without_its_driver(run: Callable, root: str) -> None:
    code, err, _ = run(ingest.main, "--source", "gs://bucket/images", "--out", root)
    assert code == 2
    assert "gs://bucket/images needs a driver that is not installed" in err and "gcsfs" in err
    code, err, _ = run(ingest.main, "--source", "s4://bucket/images", "--out", root)
    assert code == 2
    assert "did you mean s3://?" in err


def test_an_unknown_preset_says_the_nearest(run: Callable) -> None:
    code, err, _ = run(train.main, "digit")
    assert code == 2
    assert "'digit' is no preset; did you mean 'digits'?" in err


def test_an_unknown_flag_says_the_nearest(run: Callable) -> None:
    code, err, _ = run(train.main, "digits", "--fit.learning-rat", "1")
    assert code == 2
    assert "Unrecognized options: --fit.learning-rat" in err and "--fit.learning-rate" in err


def test_an_unknown_field_in_a_file_says_the_nearest(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("fit: {learning_rat: 1}")
    code, err, _ = run(train.main, "digits", "--config", str(tmp_path / "c.yaml"))
    assert code == 2
    assert "fit.learning_rat is no field; did you mean fit.learning_rate?" in err


def test_a_batch_too_small_for_its_workers(run: Callable, root: str) -> None:
    code, err, _ = run(train.main, "digits", "--root", root, "--scaling.workers", "3")
    assert code == 2
    assert "scaling.workers is 3; fit.batch_images = 128 is 2 micro-batches" in err
    assert "take 2 workers at most" in err


def test_a_value_out_of_range(run: Callable) -> None:
    code, err, _ = run(train.main, "digits", "--network.unet.groups", "5")
    assert code == 2
    assert "network.unet.groups is 5; it must divide network.unet.channels, which is 32" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--schedule.T 100", "schedule.rate is 0.02; with schedule.T = 100 it leaves ᾱ_T = 0.6 of the picture"),
        ("--schedule.kind given --schedule.T 3 --schedule.betas 0.1 0.2", "give schedule.T 2"),
        ("--schedule.zero-terminal-snr", "with schedule.zero_terminal_snr take fit.objective.target v"),
        ("--fit.ema.power-stds 0.05", "fit.ema.power_stds is (0.05,); other widths are made from two or more"),
        (
            "--fit.objective.loss reconstruction --fit.objective.weight article",
            "has the article's weight in it already",
        ),
        ("--fit.timesteps.kind log-snr-normal --fit.timesteps.log-snr-mean 90", "next to nothing of that lies in"),
        ("--network.kind dit --network.dit.patch 3", "network.dit.patch is 3; the side must be a multiple of 3"),
        ("--network.kind dit --network.dit.heads 7", "network.dit.heads is 7"),
        ("--draw.label 7", "add --network.labels"),
        ("--network.labels --draw.label x --evaluate-images 0", "it must be a label of the data: 0, 1, 2"),
        ("--network.labels --fit.label-dropout 0 --draw.guidance 2", "try --fit.label-dropout 0.1"),
        ("--draw.eta 0.5", "only ddim takes an eta"),
        ("--draw.ema-std 0.5", "draw.ema_std is 0.5; a width σ_rel must be above 0 and below"),
        ("--data.held-out -1", "data.held_out is -1; it must not be negative: try 1000, or 0"),
        ("--data.held-out 1797", "it must be less than the images of the data set, which are 1797: try 89"),
        ("--fit.timesteps.kind loss-aware --fit.objective.weight article", "too small to be told from 0"),
    ],
)
def test_choices_that_do_not_go_together(run: Callable, root: str, flags: str, message: str) -> None:
    code, err, _ = run(train.main, "digits", "--root", root, "--dry-run", *flags.split())
    assert code == 2
    assert message in " ".join(err.replace("│", " ").split())


def test_images_that_cannot_be_halved(run: Callable, root: str) -> None:
    code, err, _ = run(train.main, "digits", "--root", root, "--data.ingest.side", "9", "--dry-run")
    assert code == 2
    assert "images have a side of 9 pixels" in err and "must be a multiple of 2" in err


def test_a_url_beside_the_builtin_digits_is_not_ignored(run: Callable, root: str) -> None:
    code, err, _ = run(train.main, "digits", "--root", root, "--data.url", "/somewhere", "--dry-run")
    assert code == 2
    assert "data.url is /somewhere and data.builtin is digits; only one can be: add --data.builtin none" in err


def test_no_data_at_all(run: Callable) -> None:
    code, err, _ = run(train.main)
    assert code == 2
    assert "data.url is empty: give --data.url" in err


@pytest.fixture
def trained(root: str) -> Folder:
    """A run's folder with two checkpoints."""
    about, state, folder = replace(ABOUT, config=to_dict(DIGITS)), tiny_state(FIT), Folder(root) / "runs" / "digits"
    run_folder.claim(folder, {})
    for state.position in (128, 256):
        checkpoints.commit(folder, state, about, World())
    return folder


def test_a_checkpoint_with_a_flipped_bit_is_passed_over_and_said(run: Callable, trained: Folder, root: str) -> None:
    path = Path((trained / "checkpoint-000000000256").path("__0_0.distcp"))
    data = bytearray(path.read_bytes())
    data[1000] ^= 4
    path.write_bytes(data)
    code, err, said = run(train.main, "digits", "--root", root, "--dry-run")
    assert (code, said["starts_at"]) == (0, 128)
    assert "passing over a damaged checkpoint" in err and "checkpoint-000000000256/__0_0.distcp has sha256" in err

    # Named on its own, it is not replaced by another.
    named = ["--checkpoint", (trained / "checkpoint-000000000256").url, "--out", f"{root}/out"]
    code, err, _ = run(sample.main, *named, "--dry-run")
    assert code == 3
    assert "checkpoint-000000000256/__0_0.distcp has sha256" in err


def test_no_checkpoint_where_one_is_named(run: Callable, root: str, tmp_path: Path) -> None:
    code, err, _ = run(sample.main, "--checkpoint", str(tmp_path), "--out", root)
    assert code == 3
    assert "holds no valid checkpoint" in err
    code, err, _ = run(sample.main, "--out", root)
    assert code == 2
    assert "checkpoint is empty: give --checkpoint FOLDER" in err


def test_samples_that_are_not_there(run: Callable, root: str) -> None:
    for job, argv in ((score.main, ["--samples", root]), (sample.main, ["--out", root, "--verify"])):
        code, err, _ = run(job, *argv)
        assert code == 3
        assert "finished" in err


@pytest.mark.ray
def test_a_truncated_image_among_good_ones(
    run: Callable, tmp_path: Path, digits: tuple[np.ndarray, np.ndarray], ray_cluster: None
) -> None:
    raw = Folder(str(tmp_path / "raw"))
    for i, picture in enumerate(digits[0][:150]):
        raw.put(f"{i}.png", encode(picture, "png"))
    raw.put("bad.png", encode(digits[0][0], "png")[:50])
    code, err, said = run(
        ingest.main, "--source", raw.url, "--out", str(tmp_path / "out"), "--ingest.side", "8", "--ingest.channels", "1"
    )
    assert (code, said["images"], said["quarantined"]) == (0, 150, 1)
    assert "1 images are left out; see" in err
    assert json.loads(Folder(str(tmp_path / "out")).get("quarantine.jsonl"))["path"] == "bad.png"


@pytest.mark.ray
def test_more_bad_images_than_may_be(
    run: Callable, tmp_path: Path, digits: tuple[np.ndarray, np.ndarray], ray_cluster: None
) -> None:
    raw, out = Folder(str(tmp_path / "raw")), Folder(str(tmp_path / "out"))
    for i, picture in enumerate(digits[0][:9]):
        raw.put(f"{i}.png", encode(picture, "png"))
    raw.put("bad.png", encode(digits[0][0], "png")[:50])
    command = ["--source", raw.url, "--out", out.url, "--ingest.side", "8", "--ingest.channels", "1"]
    code, err, said = run(ingest.main, *command)
    assert code == 3
    assert "1 of 10 images are unusable, more than ingest.max_bad_share = 0.01 allows; the first: bad.png" in err
    assert "raise the share" in said["error"] and not out.exists("manifest.json")
    code, _, said = run(ingest.main, *command, "--ingest.max-bad-share", "0.1")
    assert (code, said["images"], said["quarantined"]) == (0, 9, 1)


@pytest.fixture
def claimed(root: str, folder_of_digits: Folder) -> Manifest:
    """A first start of `digits` has written down what the run is."""
    _, manifest = find_data(
        replace(DIGITS, root=root, data=replace(DIGITS.data, url=folder_of_digits.url, builtin="none"))
    )
    assert isinstance(manifest, Manifest)
    claim(replace(DIGITS, root=root), manifest)
    return manifest


@pytest.fixture
def folder_of_digits(tmp_path: Path) -> Folder:
    """The manifest of a data set; nothing reads its rows here."""
    folder = Folder(str(tmp_path / "data"))
    manifest = Manifest(
        side=8, channels=1, encoding="raw", row_group_rows=128, labels=[], label_counts=[], quarantined=0, source="",
        shards=[Shard(name="s", rows=1797, size_bytes=1, sha256="a", image_bytes=1, crc32=(0,))],
    )  # fmt: skip
    manifest.save(folder)
    return folder


@pytest.mark.parametrize(
    ("flag", "value", "field"),
    [
        ("--fit.learning-rate", "0.001", "fit.learning_rate was 0.002, is 0.001"),
        ("--fit.batch-images", "256", "fit.batch_images was 128, is 256"),
        ("--fit.ema.half-life-images", "1000", "fit.ema.half_life_images was 50000.0, is 1000.0"),
        ("--seed", "1", "seed was 0, is 1"),
        ("--network.unet.blocks", "2", "network.unet.blocks was 1, is 2"),
        ("--schedule.T", "900", "schedule.T was 1000, is 900"),
        ("--data.window-bytes", "4096", "data.window_bytes was 67108864, is 4096"),
        ("--data.held-out", "10", "data.held_out was 0, is 10"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_another_run_under_the_same_name(
    run: Callable, root: str, claimed: Manifest, folder_of_digits: Folder, flag: str, value: str, field: str, dry: bool
) -> None:
    common = ["digits", "--root", root, "--tracking.uri", "none", "--data.builtin", "none"]
    if flag == "--fit.batch-images":
        common += ["--fit.images", "256000"]
    code, err, _ = run(
        train.main, *common, "--data.url", folder_of_digits.url, flag, value, *(["--dry-run"] if dry else [])
    )
    assert code == 2
    assert f"runs/digits is another run: {field}. Give this one another --name" in err


def test_other_data_under_the_same_name(run: Callable, root: str, claimed: Manifest, folder_of_digits: Folder) -> None:
    shard = replace(claimed.shards[0], sha256="b")
    other = replace(claimed, shards=[shard])
    other.save(folder_of_digits)
    code, err, _ = run(
        train.main, "digits", "--root", root, "--data.builtin", "none", "--data.url", folder_of_digits.url, "--dry-run"
    )
    assert code == 2
    assert f"data digest was {claimed.digest}, is {other.digest}" in err


def test_images_that_are_not_ingested_yet_are_held_against_the_rest(
    run: Callable, root: str, claimed: Manifest, digits: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    raw = Folder(str(tmp_path / "raw"))
    raw.put("a.png", encode(digits[0][0], "png"))
    command = ["digits", "--root", root, "--data.builtin", "none", "--data.url", raw.url, "--dry-run"]
    code, err, _ = run(train.main, *command)
    assert code == 0 and "whether these images are those that" in err
    code, err, _ = run(train.main, *command, "--seed", "1")
    assert code == 2 and "is another run: seed was 0, is 1. Give" in err


def test_workers_length_and_rhythm_may_change(
    run: Callable, root: str, claimed: Manifest, folder_of_digits: Folder
) -> None:
    code, _, said = run(
        train.main, "digits", "--root", root, "--data.builtin", "none", "--data.url", folder_of_digits.url, "--dry-run",
        "--scaling.workers", "1", "--fit.micro-images", "32", "--fit.images", "512000", "--fit.log-images", "6400",
        "--evaluate-images", "0",
    )  # fmt: skip
    assert (code, said["steps"]) == (0, 4000)


def test_a_score_that_cannot_be_made_is_refused_before_the_training(run: Callable, root: str, tmp_path: Path) -> None:
    Folder(str(tmp_path / "raw")).put("a.png", b"x")
    code, err, _ = run(
        train.main, "digits", "--root", root, "--data.builtin", "none", "--data.url", str(tmp_path / "raw"),
        "--data.ingest.side", "64", "--data.ingest.channels", "3", "--dry-run",
    )  # fmt: skip
    assert code == 2
    assert "the score knows pixels only" in err and "give --evaluate-images 0" in err
