"""Ablation sweeps: plan (which runs), run (child processes on device sets), search (Optuna), answer (did it
matter?)."""
