"""moecli: run Mixture-of-Experts models that do not fit the graphics card."""

__version__ = "0.1.0"
