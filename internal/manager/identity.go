package manager

import (
	"bytes"
	"context"
	"encoding/pem"
	"fmt"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/tunnel"
)

// objectName is the fixed name of the manager's Deployment, Service, Secret and ConfigMap.
const objectName = "traffic-manager"

// Keys of the Secret and the ConfigMap.
const (
	secretIdentity  = "identity.pem"
	configKey       = "key"     // the fingerprint laptops pin
	configVersion   = "version" // the manager's version
	webhookPrefix   = "doppel-agent-injector-"
	injectorService = "agent-injector"
)

// ensureIdentity loads the manager's key from its Secret, or makes one on the first start, and publishes its fingerprint in the ConfigMap.
// Both belong to the Deployment, so that helm uninstall takes them along. All replicas share the key: whoever creates the Secret first wins.
func ensureIdentity(ctx context.Context, cm ctrl.Manager, cfg Config) (*tunnel.Identity, error) {
	c, r := cm.GetClient(), cm.GetAPIReader()
	key := client.ObjectKey{Namespace: cfg.Namespace, Name: objectName}
	owner, err := ownerOf(ctx, r, key)
	if err != nil {
		return nil, err
	}
	meta := metav1.ObjectMeta{Namespace: cfg.Namespace, Name: objectName, OwnerReferences: owner, Labels: map[string]string{"app.kubernetes.io/name": objectName}}
	var sec corev1.Secret
	err = r.Get(ctx, key, &sec)
	if apierrors.IsNotFound(err) {
		if err = createIdentity(ctx, c, meta, cfg.Namespace); err == nil || apierrors.IsAlreadyExists(err) {
			err = r.Get(ctx, key, &sec)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("secret %s: %w", key, err)
	}
	id, err := tunnel.ParseIdentity(sec.Data[secretIdentity])
	if err != nil {
		return nil, fmt.Errorf("secret %s: %w", key, err)
	}
	return id, publish(ctx, c, r, meta, id.Fingerprint())
}

func createIdentity(ctx context.Context, c client.Client, meta metav1.ObjectMeta, ns string) error {
	id, err := tunnel.NewIdentity(
		injectorService+"."+ns+".svc", objectName+"."+ns+".svc", objectName+"."+ns+".svc.cluster.local")
	if err != nil {
		return err
	}
	pem, err := id.MarshalPEM()
	if err != nil {
		return err
	}
	return c.Create(ctx, &corev1.Secret{ObjectMeta: meta, Data: map[string][]byte{secretIdentity: pem}})
}

func publish(ctx context.Context, c client.Client, r client.Reader, meta metav1.ObjectMeta, fingerprint string) error {
	want := &corev1.ConfigMap{ObjectMeta: meta, Data: map[string]string{configKey: fingerprint, configVersion: buildinfo.Version}}
	err := c.Create(ctx, want)
	if !apierrors.IsAlreadyExists(err) {
		return err
	}
	var cm corev1.ConfigMap
	if err := r.Get(ctx, client.ObjectKeyFromObject(want), &cm); err != nil {
		return err
	}
	cm.Data = want.Data
	return c.Update(ctx, &cm)
}

// ownerOf refers to the manager's Deployment; a manager that runs without one (a test) owns nothing.
func ownerOf(ctx context.Context, r client.Reader, key client.ObjectKey) ([]metav1.OwnerReference, error) {
	var d appsv1.Deployment
	if err := r.Get(ctx, key, &d); apierrors.IsNotFound(err) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("deployment %s: %w", key, err)
	}
	return []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "Deployment", Name: d.Name, UID: d.UID}}, nil
}

// publishCABundle writes our certificate into the webhook's configuration and repairs it when a helm upgrade or someone else takes it out.
func (m *Manager) publishCABundle(ctx context.Context) error {
	tick := time.NewTicker(10 * time.Second)
	defer tick.Stop()
	for {
		if err := m.ensureCABundle(ctx); err != nil {
			m.cfg.Log.Warn("webhook configuration not updated, nothing will be injected", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (m *Manager) ensureCABundle(ctx context.Context) error {
	var wh admissionv1.MutatingWebhookConfiguration
	if err := m.ctrl.GetAPIReader().Get(ctx, client.ObjectKey{Name: webhookPrefix + m.cfg.Namespace}, &wh); err != nil {
		return err
	}
	bundle := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: m.identity.TLSCertificate().Certificate[0]})
	changed := false
	for i := range wh.Webhooks {
		if !bytes.Equal(wh.Webhooks[i].ClientConfig.CABundle, bundle) {
			wh.Webhooks[i].ClientConfig.CABundle, changed = bundle, true
		}
	}
	if !changed {
		return nil
	}
	return m.ctrl.GetClient().Update(ctx, &wh)
}
