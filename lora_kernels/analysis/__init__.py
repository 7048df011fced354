"""What an adapter has learned: measures of ΔW, and tools that change ranks."""
