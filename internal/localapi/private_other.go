//go:build !unix

package localapi

import (
	"io"
	"os"
)

// checkPrivate trusts the access control list of the user's own directories.
func checkPrivate(string) error { return nil }

// lockFile takes no lock: the daemons do not run on this system yet.
func lockFile(path string) (io.Closer, error) { return os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600) }
