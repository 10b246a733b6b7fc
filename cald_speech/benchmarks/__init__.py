"""The one stopwatch, and what is measured with it (floor F6). Figures are ratios within one run: machines differ."""
