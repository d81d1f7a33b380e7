"""Static scales from real tokens."""

from .calibrating import ESTIMATORS, FORMATS, Calibration, calibrate

__all__ = ["ESTIMATORS", "FORMATS", "Calibration", "calibrate"]
