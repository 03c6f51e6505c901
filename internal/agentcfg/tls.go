package agentcfg

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"sync"
)

// AnnotationTLS on a pod template names, for container ports that speak TLS, the secret with the app's certificate: "8443=web-tls, 9443=admin-tls".
// AnnotationTLSClient names in the same way the secret with the certificate that the app demands of its clients.
const (
	AnnotationTLS       = "doppel.dev/tls"
	AnnotationTLSClient = "doppel.dev/tls-client"
)

// TLS says where the agent finds what it needs to end a port's TLS.
type TLS struct {
	Dir       string `json:"dir"`                 // with tls.crt, tls.key and perhaps ca.crt
	ClientDir string `json:"clientDir,omitempty"` // the same of what the agent shows to the app
}

// Secrets are the names of the TLS secrets of a port.
type Secrets struct {
	Server, Client string
}

// secretRE is what Kubernetes takes for a secret's name (RFC 1123 subdomain).
var secretRE = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$`) })

// TLSSecrets reads the two annotations, by container port.
func TLSSecrets(annotations map[string]string) (map[uint16]Secrets, error) {
	out := map[uint16]Secrets{}
	err := eachSecret(annotations, AnnotationTLS, func(port uint16, secret string) error {
		if _, twice := out[port]; twice {
			return fmt.Errorf("port %d is there twice", port)
		}
		out[port] = Secrets{Server: secret}
		return nil
	})
	if err != nil {
		return nil, err
	}
	err = eachSecret(annotations, AnnotationTLSClient, func(port uint16, secret string) error {
		s, ok := out[port]
		switch {
		case !ok:
			return fmt.Errorf("port %d is not in %s", port, AnnotationTLS)
		case s.Client != "":
			return fmt.Errorf("port %d is there twice", port)
		}
		s.Client = secret
		out[port] = s
		return nil
	})
	return out, err
}

func eachSecret(annotations map[string]string, key string, fn func(uint16, string) error) error {
	text := strings.TrimSpace(annotations[key])
	if text == "" {
		return nil
	}
	for _, item := range strings.Split(text, ",") {
		number, secret, _ := strings.Cut(strings.TrimSpace(item), "=")
		port, err := strconv.ParseUint(strings.TrimSpace(number), 10, 16)
		secret = strings.TrimSpace(secret)
		if err != nil || port == 0 || !secretRE().MatchString(secret) {
			return fmt.Errorf("annotation %s: %q is not PORT=SECRET, such as 8443=web-tls", key, strings.TrimSpace(item))
		}
		if err := fn(uint16(port), secret); err != nil {
			return fmt.Errorf("annotation %s: %w", key, err)
		}
	}
	return nil
}
