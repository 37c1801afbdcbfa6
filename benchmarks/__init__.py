"""What was measured, and with what. Each module runs alone and says how in its docstring."""
