"""cryo_svae: content, rotation and shift of cryo-EM particles by spatial variational autoencoders."""

__version__ = "0.1.0"
