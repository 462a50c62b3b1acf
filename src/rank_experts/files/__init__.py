"""An adapter's folder: its layout, saving and loading, the model card, PEFT's and LoRA's folders."""
