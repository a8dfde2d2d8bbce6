"""Measuring and showing: the report, comparisons, the Long⊗Short pipeline, benchmarks."""
