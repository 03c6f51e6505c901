package inject

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/doppel-dev/doppel/internal/agentcfg"
)

// Find picks the ports a user named, in that order; without a name the only one. No port can be named twice.
func Find(ports []Taken, names []string, service, container string) ([]Taken, error) {
	if len(names) == 0 {
		names = []string{""}
	}
	var out []Taken
	for _, name := range names {
		p, err := find(ports, name, service, container)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(out, func(o Taken) bool { return o.ContainerPort == p.ContainerPort && o.Protocol == p.Protocol }) {
			return nil, &PortError{"SamePort", fmt.Sprintf("one port %s, which is named twice", describe([]Taken{p}))}
		}
		out = append(out, p)
	}
	return out, nil
}

// find picks one port: a service port's or container port's name or number, narrowed by service and container.
// Where both fit, the service's port is meant. An empty name means the only port there is, or the only one that a service leads to. A suffix
// /tcp or /udp narrows it to a protocol; without one a TCP port is meant before a UDP port.
// The port's Services are narrowed to those that were meant. The error lists what could have been meant.
func find(ports []Taken, name, service, container string) (Taken, error) {
	name, protocol, _ := strings.Cut(name, "/")
	all, err := narrow(ports, protocol, service, container)
	if err != nil {
		return Taken{}, err
	}
	got := all
	if name != "" {
		got = named(all, name)
	}
	if t := tcp(got); len(t) > 0 && protocol == "" {
		got = t
	}
	if name == "" && len(got) > 1 {
		if s := slices.DeleteFunc(slices.Clone(got), func(p Taken) bool { return len(p.Services) == 0 }); len(s) == 1 {
			got = s
		}
	}
	switch {
	case len(got) == 1:
		return got[0], nil
	case len(all) == 0:
		return Taken{}, &PortError{"NoPort", "no port: no service leads to its pods and no container declares one"}
	case len(got) == 0:
		return Taken{}, &PortError{"NoSuchPort", fmt.Sprintf("no port %q; there is %s", name, describe(all))}
	case name == "":
		return Taken{}, &PortError{"AmbiguousPort", "several ports: " + describe(got)}
	}
	return Taken{}, &PortError{"AmbiguousPort", fmt.Sprintf("several ports that %q could mean: %s", name, describe(got))}
}

func tcp(ports []Taken) []Taken {
	return slices.DeleteFunc(slices.Clone(ports), func(p Taken) bool { return p.Protocol != corev1.ProtocolTCP })
}

// Any picks a port to put an agent in front of where no port is meant: one that needs no privilege if there is one.
func Any(ports []Taken) ([]Taken, error) {
	tcp := tcp(ports)
	if len(tcp) == 0 {
		return nil, &PortError{"NoPort", "no TCP port: no service leads to its pods and no container declares one"}
	}
	if i := slices.IndexFunc(tcp, func(p Taken) bool { return p.Way == agentcfg.ByName }); i >= 0 {
		return tcp[i : i+1], nil
	}
	return tcp[:1], nil
}

// narrow keeps the TCP and UDP ports, those of a protocol, of a service and of a container; "" is any.
func narrow(ports []Taken, protocol, service, container string) ([]Taken, error) {
	kept := slices.DeleteFunc(slices.Clone(ports), func(p Taken) bool {
		return p.Protocol != corev1.ProtocolTCP && p.Protocol != corev1.ProtocolUDP || protocol != "" && !strings.EqualFold(protocol, string(p.Protocol))
	})
	if service != "" {
		all := kept
		kept = nil
		for _, p := range all {
			if p.Services = only(p.Services, func(s ServicePort) bool { return s.Service == service }); len(p.Services) > 0 {
				kept = append(kept, p)
			}
		}
		if len(kept) == 0 {
			return nil, &PortError{"NoSuchService", fmt.Sprintf("no service %q that leads to its pods; there is %s", service, describe(all))}
		}
	}
	if container != "" {
		all := kept
		kept = slices.DeleteFunc(slices.Clone(all), func(p Taken) bool { return p.Container != container })
		if len(kept) == 0 {
			return nil, &PortError{"NoSuchContainer", fmt.Sprintf("no container %q with such a port; there is %s", container, describe(all))}
		}
	}
	return kept, nil
}

// named keeps the ports that services know under the name or number or, if there are none, that containers do.
func named(ports []Taken, name string) []Taken {
	n, err := strconv.Atoi(name)
	isNumber := err == nil
	var out []Taken
	for _, p := range ports {
		p.Services = only(p.Services, func(s ServicePort) bool { return isNumber && int(s.Port) == n || !isNumber && s.Name == name })
		if len(p.Services) > 0 {
			out = append(out, p)
		}
	}
	if len(out) > 0 {
		return out
	}
	return slices.DeleteFunc(slices.Clone(ports), func(p Taken) bool {
		return isNumber && int(p.ContainerPort) != n || !isNumber && p.Name != name
	})
}

func only(s []ServicePort, keep func(ServicePort) bool) []ServicePort {
	return slices.DeleteFunc(slices.Clone(s), func(p ServicePort) bool { return !keep(p) })
}

// PortError says why no port was found. The message follows "Deployment web has".
type PortError struct{ Reason, Msg string }

func (e *PortError) Error() string { return e.Msg }

func describe(ports []Taken) string {
	if len(ports) == 0 {
		return "none"
	}
	var out []string
	for _, p := range ports {
		s := strconv.Itoa(int(p.ContainerPort))
		if p.Protocol != corev1.ProtocolTCP {
			s += "/" + strings.ToLower(string(p.Protocol))
		}
		if p.Name != "" {
			s += " (" + p.Name + ")"
		}
		for _, sp := range p.Services {
			s += fmt.Sprintf(" [service %s:%d]", sp.Service, sp.Port)
		}
		out = append(out, s)
	}
	return strings.Join(out, ", ")
}
