"""All that knows dynamo or Inductor: a backend, a fused loop, how the ops are compiled."""
