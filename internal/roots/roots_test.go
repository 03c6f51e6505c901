package roots

import (
	"crypto/x509"
	"testing"
)

// TestEnsure is on a system without a list of authorities, as a container of one of our images is.
func TestEnsure(t *testing.T) {
	t.Setenv("SSL_CERT_FILE", "/nonexistent")
	t.Setenv("SSL_CERT_DIR", "/nonexistent")
	before, err := x509.SystemCertPool()
	if err != nil || !before.Equal(x509.NewCertPool()) {
		t.Skipf("this system has authorities elsewhere: %v", err)
	}
	Ensure()
	Ensure()
	after, err := x509.SystemCertPool()
	if err != nil || after.Equal(x509.NewCertPool()) {
		t.Errorf("there are none: %v", err)
	}
}
