"""Which fields KubeRay's resources have, as JSON Schemas, and what of them Kubernetes' own schemas say.

The fields and their values are those of KubeRay 1.7.1, from its API reference (docs.ray.io, KubeRay CRD API reference;
ray-project/kuberay, ray-operator/apis/ray/v1; Apache-2.0), without those that are for its operator alone (status,
managedBy, suspend of a group). Where its CRDs (commit 034971d) ask for less, as for counts that may be below 0, this
is the stricter one. Pods, containers and the rest that KubeRay takes from Kubernetes are checked against the
schema of Kubernetes, by :func:`check`. A field that is in neither is refused.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

KUBERNETES = "1.37.0"
DEFINITIONS = "https://kubernetes.io/api/_definitions.json"
Schema = dict[str, Any]
STRING, BOOLEAN, INTEGER, NUMBER = ({"type": name} for name in ("string", "boolean", "integer", "number"))
COUNT: Schema = {"type": "integer", "minimum": 0}
STRINGS: Schema = {"type": "object", "additionalProperties": STRING}
LIST: Schema = {"type": "array", "items": STRING}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def core(name: str, many: bool = False) -> Schema:
    """Of a type that is Kubernetes' own."""
    schema = {"$ref": f"{DEFINITIONS}#/$defs/io.k8s.{name}"}
    return {"type": "array", "items": schema} if many else schema


def record(required: str = "", **fields: Schema) -> Schema:
    """An object with these fields, and no others."""
    return {"type": "object", "properties": fields, "additionalProperties": False, "required": required.split()}


_POD, _RESOURCES = core("api.core.v1.PodTemplateSpec"), core("api.core.v1.ResourceRequirements")
_AUTOSCALER = record(
    resources=_RESOURCES, image=STRING, imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
    securityContext=core("api.core.v1.SecurityContext"), idleTimeoutSeconds=COUNT, version=one_of("v1", "v2"),
    upscalingMode=one_of("Default", "Aggressive", "Conservative"), env=core("api.core.v1.EnvVar", many=True),
    envFrom=core("api.core.v1.EnvFromSource", many=True), volumeMounts=core("api.core.v1.VolumeMount", many=True),
    command=LIST, args=LIST,
)  # fmt: skip
_GROUP = {"template": _POD, "rayStartParams": STRINGS, "resources": STRINGS, "labels": STRINGS}
_HEAD = record(
    "template rayStartParams", **_GROUP, headService=core("api.core.v1.Service"), enableIngress=BOOLEAN,
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
)  # fmt: skip
_WORKERS = record(
    "groupName template rayStartParams minReplicas maxReplicas", **_GROUP, groupName=STRING, replicas=COUNT,
    minReplicas=COUNT, maxReplicas=COUNT, numOfHosts=COUNT, idleTimeoutSeconds=COUNT, priority=INTEGER,
    scaleStrategy=record(workersToDelete=LIST),
)  # fmt: skip
_CLUSTER = record(
    "headGroupSpec", upgradeStrategy=record(type=one_of("Recreate", "None")), suspend=BOOLEAN, rayVersion=STRING,
    authOptions=record(mode=one_of("disabled", "token"), secretName=STRING, enableK8sTokenAuth=BOOLEAN),
    enableInTreeAutoscaling=BOOLEAN, autoscalerOptions=_AUTOSCALER, headServiceAnnotations=STRINGS,
    headGroupSpec=_HEAD, workerGroupSpecs={"type": "array", "items": _WORKERS},
)  # fmt: skip
_JOB = record(
    activeDeadlineSeconds=COUNT, backoffLimit=COUNT, rayClusterSpec=_CLUSTER, submitterPodTemplate=_POD,
    metadata=STRINGS, clusterSelector=STRINGS, submitterConfig=record(backoffLimit=COUNT), entrypoint=STRING,
    runtimeEnvYAML=STRING, jobId=STRING, entrypointResources=STRING, entrypointNumCpus=NUMBER,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"), entrypointNumGpus=NUMBER,
    ttlSecondsAfterFinished=COUNT, preRunningDeadlineSeconds={"type": "integer", "minimum": 1},
    shutdownAfterJobFinishes=BOOLEAN, suspend=BOOLEAN,
)  # fmt: skip
_SPECS = {
    "RayCluster": _CLUSTER,
    "RayJob": _JOB,
    "RayCronJob": record(
        "jobTemplate schedule", jobTemplate=_JOB, schedule=STRING, timeZone={"type": "string", "minLength": 1},
        suspend=BOOLEAN,
    ),
}  # fmt: skip


@cache
def _read(name: str) -> Any:
    return schema_contents(f"kubernetes-json-schema/v{KUBERNETES}-local-strict/{name}", KUBERNETES)


@cache
def _validator(api: str, kind: str) -> Draft202012Validator:
    if api == "ray.io/v1":
        meta = core("apimachinery.pkg.apis.meta.v1.ObjectMeta")
        schema = record("metadata spec", apiVersion=STRING, kind=STRING, metadata=meta, spec=_SPECS[kind])
    else:
        group, _, version = api.rpartition("/")
        schema = _read("-".join([kind.lower(), *group.split(".")[:1], version]).replace("--", "-") + ".json")
    return Draft202012Validator(schema, registry=Resource.from_contents(_read("_definitions.json")) @ Registry())


def check(resource: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a resource: unknown fields, wrong types, values that there are not."""
    for error in _validator(resource["apiVersion"], resource["kind"]).iter_errors(resource):
        yield f"{resource['kind']} {resource['metadata'].get('name')}: {error.json_path}: {error.message[:300]}"
