"""The objective: advantages, denominators, gates, terms, schedules and the one division. Pure torch, no I/O."""
