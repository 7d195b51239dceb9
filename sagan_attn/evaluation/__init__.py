"""What a classifier's answers are worth: scores, figures, sheets of images, and two models on the same images."""
