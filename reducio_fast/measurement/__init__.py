"""Whether the fast path is right and how fast it is: parity, bench, profile, tuning, kernel builds."""
