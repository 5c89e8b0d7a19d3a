"""The hand-off of latents from prefill to decode instances."""
