"""``make versions``: runs some of the tests with other versions of the packages."""
