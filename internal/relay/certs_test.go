package relay

import (
	"crypto/x509"
	"testing"
	"time"
)

// What the built-in CA has made is good for those whose clock is hours away from what the relay's was.
func TestBuiltinCAOfAnotherClock(t *testing.T) {
	ca, err := newBuiltinCA(t.TempDir(), "relay.test")
	if err != nil {
		t.Fatal(err)
	}
	c, err := ca.Get(nil)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	for off, ok := range map[time.Duration]bool{0: true, 3 * time.Hour: true, -3 * time.Hour: true, leafLife + time.Hour: false} {
		_, err := c.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: "demo.relay.test", CurrentTime: time.Now().Add(off)})
		if (err == nil) != ok {
			t.Errorf("clock off by %v: %v", off, err)
		}
	}
}
