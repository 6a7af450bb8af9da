"""One file per recurrence: its recurrent form (the plain statement of the mathematics), its
chunked form (what training uses on a CPU), the call of flash-linear-attention (on CUDA, where there
is one), the choice between them, and its one-token step (what decoding uses)."""
