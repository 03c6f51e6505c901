package localapi

import (
	"net/netip"
	"regexp"
	"strings"
	"sync"

	"github.com/doppel-dev/doppel/internal/uerr"
)

// DNSOptions are whose names the cluster answers. The zero value: those of all its services and pods, and no others.
type DNSOptions struct {
	// MappedNamespaces are those whose services and pods have names on this machine, beside the connected one; none means all.
	MappedNamespaces []string `json:"mappedNamespaces,omitempty"`
	// IncludeSuffixes are further domains that the cluster's DNS is asked for, ExcludeSuffixes such that it never is; the longest decides.
	IncludeSuffixes []string `json:"includeSuffixes,omitempty"`
	ExcludeSuffixes []string `json:"excludeSuffixes,omitempty"`
	// Mappings are names that stand for others.
	Mappings []DNSMapping `json:"mappings,omitempty"`
}

// DNSMapping has Name answered as AliasFor, a name or an IP address.
type DNSMapping struct {
	Name     string `json:"name"`
	AliasFor string `json:"aliasFor"`
}

// IsZero reports whether o changes nothing.
func (o DNSOptions) IsZero() bool {
	return len(o.MappedNamespaces)+len(o.IncludeSuffixes)+len(o.ExcludeSuffixes)+len(o.Mappings) == 0
}

var (
	label  = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`) })
	domain = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*$`) })
)

// Validate checks the form of all names.
func (o DNSOptions) Validate() error {
	for _, ns := range o.MappedNamespaces {
		if !label().MatchString(ns) {
			return uerr.New(uerr.Usage, "list them with: kubectl get namespaces", "mapped namespace %q is no namespace's name", ns)
		}
	}
	for _, list := range [][]string{o.IncludeSuffixes, o.ExcludeSuffixes} {
		for _, d := range list {
			if !isDomain(strings.TrimPrefix(d, ".")) {
				return uerr.New(uerr.Usage, "write it like internal.example.com", "DNS suffix %q is no domain", d)
			}
		}
	}
	for _, m := range o.Mappings {
		_, err := netip.ParseAddr(m.AliasFor)
		if !isDomain(m.Name) || err != nil && !isDomain(m.AliasFor) {
			return uerr.New(uerr.Usage, "write it like db.example.com=db.staging, or db.example.com=10.1.2.3", "DNS mapping %q=%q: want a name, and a name or an address", m.Name, m.AliasFor)
		}
	}
	return nil
}

func isDomain(s string) bool {
	s = strings.ToLower(strings.TrimSuffix(s, "."))
	return len(s) <= 253 && domain().MatchString(s)
}
