"""What tests of several packages share; what those of one package share lies in its folder."""
