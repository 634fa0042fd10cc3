"""How a run goes: the only package that knows accelerate."""
