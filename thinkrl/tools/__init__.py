"""What measures and shows: the report, comparisons, the Long⊗Short pipeline, benchmarks."""
