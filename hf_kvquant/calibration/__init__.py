"""Static scales from real tokens."""

from .calibrating import ESTIMATORS, STATIC_FORMATS, Calibration, calibrate

__all__ = ["ESTIMATORS", "STATIC_FORMATS", "Calibration", "calibrate"]
