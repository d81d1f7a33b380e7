"""What has to be known of transformers and of a loaded model."""
