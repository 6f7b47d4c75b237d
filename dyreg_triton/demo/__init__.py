"""`python -m dyreg_triton.demo`: train a small network with one DyReG layer on moving digits and show it."""
