"""One file per recurrence: its recurrent form (the plain statement of the mathematics), its
chunked form (what training uses) and its one-token step (what decoding uses)."""
