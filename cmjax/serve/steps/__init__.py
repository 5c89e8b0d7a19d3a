"""The jitted steps of prefill and decode, and how a token is drawn in them."""
