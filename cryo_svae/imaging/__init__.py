"""What an image is: centres, signs and units, the CTF, and polar Fourier space."""
