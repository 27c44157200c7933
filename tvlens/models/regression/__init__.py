"""Transformers that learn functions in context."""

from tvlens.models.regression.transformer import (
    RegressionTransformer,
    load_garg,
    load_regression,
    save_regression,
)

__all__ = ["RegressionTransformer", "load_garg", "load_regression", "save_regression"]
