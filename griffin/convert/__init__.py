"""Google's checkpoints turned into model folders, and back."""

from griffin.convert.google import convert, google_to_griffin, griffin_to_google

__all__ = ["convert", "google_to_griffin", "griffin_to_google"]
