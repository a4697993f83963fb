"""What is true: the mathematics of Brickyard, in the article's own symbols.

The law of this layer: pure torch. No Ray, no MLflow, no storage, no rank, no global random state. The maths takes
the network as a callable and never imports one.

The source is Su Jianlin's article "DDPM = demolition + construction" (https://kexue.fm/archives/9119), whose α and β
are *amplitudes*, α_t² + β_t² = 1. The DDPM paper (https://arxiv.org/abs/2006.11239) writes ᾱ for what is ᾱ² here.

=========================  ==================================  =====================================================
symbol                     code                                meaning
=========================  ==================================  =====================================================
α_t, β_t                   ``alpha[t]``, ``beta[t]``           one step of demolition, x_t = α_t x_{t-1} + β_t ε_t
ᾱ_t = Π α, β̄_t = √(1-ᾱ²)   ``alpha_bar[t]``, ``beta_bar[t]``   t steps at once, x_t = ᾱ_t x_0 + β̄_t ε
σ_t                        ``sigma[t]``                        the noise that is put back while building
ε                          ``eps``                             what was mixed in: standard normal noise
ε̂(x_t, t)                  ``eps_theta(x_t, t)``               the network: the paper's prediction of ε. The article's
                                                               ε_θ is (β_t/β̄_t) ε̂
=========================  ==================================  =====================================================

Tables are float64 and start at index 0, the clean image (ᾱ_0 = 1, β̄_0 = 0), so ``alpha_bar[t]`` is ᾱ_t.
Images are float32 of shape ``[B, C, H, W]`` in [-1, 1]; ``t`` is an int64 tensor of shape ``[B]`` in 1..T.

The article's equations, section by section, and where they are:

============================================================  =======================================================
what to tear down, and how: x_t = α_t x_{t-1} + β_t ε_t       :func:`models.process.demolish_step`
… t steps at once: x_t = ᾱ_t x_0 + β̄_t ε                      :func:`models.process.demolish`
how to build: μ(x_t) = (x_t - β_t ε_θ)/α_t,
‖x_{t-1} - μ(x_t)‖²                                           :func:`models.objective.reconstruction_loss`
… its weight β_t²/α_t²                                        :func:`models.objective.weights`, ``article``
… ‖ε_t - ε_θ(ᾱ_t x_0 + α_t β̄_{t-1} ε̄ + β_t ε_t, t)‖²          :func:`models.objective.two_noise_loss`
less variance: ε_t = (β_t ε - α_t β̄_{t-1} ω)/β̄_t, and the
loss with ω integrated out                                    ``tests/models/test_objective.py``, to the last digit
… ‖ε - (β̄_t/β_t) ε_θ(ᾱ_t x_0 + β̄_t ε, t)‖²                    :func:`models.objective.reduced_loss`
… the paper's ε_θ is (β̄_t/β_t) times the article's             :func:`models.objective.in_the_articles_scale`
… what it saves                                               ``benchmarks/variance.py``
recursion: x_{t-1} = (x_t - β_t ε_θ)/α_t                      :func:`models.samplers.greedy`
… + σ_t z, σ_t = β_t                                          :func:`models.samplers.random`
settings: α_t = √(1 - 0.02 t/T), log ᾱ_T < -0.005 (T+1)       :func:`models.schedule.article`
… why α_t should fall                                         :func:`models.schedule.constant` beside it
… t as sines and cosines, in every residual block             :func:`models.encoding.sinusoidal`
============================================================  =======================================================
"""
