package inject

import (
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/doppel-dev/doppel/internal/agentcfg"
)

// tlsVolumePrefix begins the names of the volumes with TLS secrets, tlsDir is where they are mounted, in the agent only.
const (
	tlsVolumePrefix = "doppel-tls-"
	tlsDir          = "/run/doppel/"
)

// tlsVolume is a TLS secret for the agent.
type tlsVolume struct {
	name, dir, secret string
}

// volume is optional: a secret that is missing must not keep the pod from starting. The agent then passes the port's TLS on, and says so.
func (v tlsVolume) volume() corev1.Volume {
	yes := true
	return corev1.Volume{Name: v.name, VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: v.secret, Optional: &yes}}}
}

// endTLS has the agent end the TLS of the ports that it takes and that have a secret.
func endTLS(ac *agentcfg.Config, secrets map[uint16]agentcfg.Secrets) []tlsVolume {
	var out []tlsVolume
	add := func(kind string, port uint16, secret string) string {
		v := tlsVolume{name: fmt.Sprintf("%s%s-%d", tlsVolumePrefix, kind, port), dir: fmt.Sprintf("%s%s/%d", tlsDir, kind, port), secret: secret}
		out = append(out, v)
		return v.dir
	}
	for i := range ac.Ports {
		p := &ac.Ports[i]
		s := secrets[p.ContainerPort]
		if s.Server == "" || p.Protocol != string(corev1.ProtocolTCP) {
			continue
		}
		p.TLS = &agentcfg.TLS{Dir: add("server", p.ContainerPort, s.Server)}
		if s.Client != "" {
			p.TLS.ClientDir = add("client", p.ContainerPort, s.Client)
		}
	}
	return out
}

// TLSReason says by what a port is known to speak TLS, or "".
func TLSReason(spec *corev1.PodSpec, t Taken, f Facts) string {
	for _, via := range t.Services {
		for i := range f.Services {
			s := &f.Services[i]
			if s.Name != via.Service {
				continue
			}
			for _, sp := range s.Spec.Ports {
				switch {
				case sp.Port != via.Port || proto(sp.Protocol) != t.Protocol:
				case sp.AppProtocol != nil && strings.EqualFold(*sp.AppProtocol, "https"):
					return "appProtocol https of service " + s.Name
				case isHTTPS(sp.Name):
					return "the name " + sp.Name + " of the port of service " + s.Name
				}
			}
		}
	}
	if isHTTPS(t.Name) {
		return "its name " + t.Name
	}
	for _, c := range spec.Containers {
		for _, p := range []*corev1.Probe{c.ReadinessProbe, c.LivenessProbe, c.StartupProbe} {
			if p != nil && p.HTTPGet != nil && p.HTTPGet.Scheme == corev1.URISchemeHTTPS && isPort(p.HTTPGet.Port, t) {
				return "a probe of it with scheme HTTPS"
			}
		}
	}
	return ""
}

func isHTTPS(name string) bool { return name == "https" || strings.HasPrefix(name, "https-") }

func isPort(p intstr.IntOrString, t Taken) bool {
	if p.Type == intstr.String {
		return p.StrVal == t.Name && t.Name != ""
	}
	return p.IntVal == int32(t.ContainerPort)
}
