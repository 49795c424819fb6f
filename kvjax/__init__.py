"""kvjax: a JAX laboratory for compressed KV caches."""
