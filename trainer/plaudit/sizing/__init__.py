"""How many reward services a number of trainers needs: a simulation of both, and advice from it. Needs no torch."""
