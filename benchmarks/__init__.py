"""What was measured, and with what: README.md says what each measures, how long it takes and where its result is."""
