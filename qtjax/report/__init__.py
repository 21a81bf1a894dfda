"""Pictures and tables of a run, from saved files only; no model code."""
