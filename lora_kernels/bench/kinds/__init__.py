"""The suite `kinds` of the bench: layers that are no plain linear ones, beside PEFT's and the frozen layer."""
