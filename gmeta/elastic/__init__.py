"""Straggler mitigation: who computes which samples, and who already has. Imports no torch and nothing of ours."""
