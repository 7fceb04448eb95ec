"""The three-partition KV cache: partitions, archive, selection, positions, rotation."""
