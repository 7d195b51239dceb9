"""Using a trained model on images of one's own."""

from sagan_attn.inference.predict import Prediction, predict_images

__all__ = ["Prediction", "predict_images"]
