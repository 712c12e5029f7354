"""Attention over the paged K/V cache: one backend a file, `torch_reference` being the specification of the others."""
