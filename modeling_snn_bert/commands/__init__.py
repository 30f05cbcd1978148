"""Commands of `snn-bert` that have a module each. They stay here: no checkpoint carries them."""
