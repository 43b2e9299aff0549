"""`tsqp-shm bench quality`: how far each mode's words and logits are from those of the model in float32."""
