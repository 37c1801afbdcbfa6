"""The ranking service: people rank answers on a web page that never loses their input. No torch."""
