"""Static scales from real tokens."""

from .calibrating import ESTIMATORS, STATIC_FORMATS, Calibration, calibrate, check_calibrating

__all__ = ["ESTIMATORS", "STATIC_FORMATS", "Calibration", "calibrate", "check_calibrating"]
