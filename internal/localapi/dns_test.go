package localapi

import (
	"testing"

	"github.com/doppel-dev/doppel/internal/uerr"
)

func TestDNSOptions(t *testing.T) {
	good := DNSOptions{
		MappedNamespaces: []string{"default", "team-a"},
		IncludeSuffixes:  []string{".internal.example.com", "corp."},
		ExcludeSuffixes:  []string{"dev"},
		Mappings:         []DNSMapping{{"db", "db.staging"}, {"DB.example.com.", "10.1.2.3"}, {"six", "fd00::1"}},
	}
	if err := good.Validate(); err != nil || good.IsZero() {
		t.Errorf("%v, zero %v", err, good.IsZero())
	}
	if err := (DNSOptions{}).Validate(); err != nil || !(DNSOptions{}).IsZero() {
		t.Errorf("zero value: %v", err)
	}
	for name, bad := range map[string]DNSOptions{
		"namespace":      {MappedNamespaces: []string{"a.b"}},
		"empty":          {MappedNamespaces: []string{""}},
		"suffix":         {IncludeSuffixes: []string{"*.example.com"}},
		"exclude suffix": {ExcludeSuffixes: []string{"."}},
		"mapping":        {Mappings: []DNSMapping{{"a", "10.1.2.300/8"}}},
		"no name":        {Mappings: []DNSMapping{{"", "10.1.2.3"}}},
	} {
		if err := bad.Validate(); uerr.From(err).Kind != uerr.Usage || uerr.From(err).Hint == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
}
