"""An exported model -> NLL, samples, Fréchet distances, and from those points a scaling law."""
