// Package roots owns the public authorities that certificates are verified by where the system has none: images have nothing but the program.
package roots

import (
	"crypto/x509"
	"sync"

	"golang.org/x/crypto/x509roots/fallback/bundle"
)

// Ensure lets Mozilla's list count where the system has no list of its own. It costs some milliseconds and a megabyte, so only those call it who
// verify certificates of anybody's.
var Ensure = sync.OnceFunc(func() {
	pool := x509.NewCertPool()
	for r := range bundle.Roots() {
		c, err := x509.ParseCertificate(r.Certificate)
		if err != nil {
			continue // one that this Go does not take
		}
		if r.Constraint == nil {
			pool.AddCert(c)
		} else {
			pool.AddCertWithConstraint(c, r.Constraint)
		}
	}
	x509.SetFallbackRoots(pool)
})
