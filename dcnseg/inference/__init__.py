"""From a trained network and a picture to a label map."""
